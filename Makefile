PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint format types ci train benchmarks pack clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.ready  ## build the environment in .venv

$(VENV)/.ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup  ## make a phantom pair, register it, print the error before and after
	$(BIN)/python -m common.data.phantom create $(DEMO)
	$(BIN)/python -m monai.bundle run --config_file bundles/recorr/configs/inference.json \
		--fixed $(DEMO)/fixed.nii.gz --moving $(DEMO)/moving.nii.gz \
		--fixed_label $(DEMO)/fixed_label.nii.gz --moving_label $(DEMO)/moving_label.nii.gz \
		--output_dir $(DEMO)/result
	@$(BIN)/python -m common.data.phantom check $(DEMO)

test: setup  ## run the fast tests
	$(BIN)/python -m pytest

test-all: setup  ## run all tests, the slow ones too
	$(BIN)/python -m pytest -m ''

lint: setup  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup  ## put code into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup  ## check types
	$(BIN)/mypy

ci: test lint types  ## what CI runs

train: setup  ## train ReCorr on generated pairs
	$(BIN)/python -m monai.bundle run --config_file bundles/recorr/configs/train.json

benchmarks: setup  ## measure correlation, sampling, the network and the whole command
	$(BIN)/python -m benchmarks.correlation
	$(BIN)/python -m benchmarks.sampling
	$(BIN)/python -m benchmarks.recorr_forward
	$(BIN)/python -m benchmarks.command

pack: setup  ## make the bundles' zip files in dist/
	for bundle in bundles/*/; do $(BIN)/python -m common.packing $$bundle --output_dir dist || exit 1; done

clean:  ## remove the environment and everything generated
	rm -rf $(VENV) $(DEMO) dist runs .mypy_cache .ruff_cache .pytest_cache *.egg-info

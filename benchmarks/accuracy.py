"""Every method on the same pairs, judged by the same code: `python -m benchmarks.accuracy` prints the table.

Rows: no displacement, our affine stage, ANTs SyN, ConvexAdam, instance optimisation without a network, and each bundle
of bundles/ with the network alone and with instance optimisation. Blocks: the Hippocampus validation pairs, the other
pairs of the test scans, generated pairs with their exact field. A method gets all pairs as NIfTI files, in a process of
its own for each data set, and is judged from the files it writes. SyN and ConvexAdam start from our affine stage, as
the bundles do.

Results are kept, a CSV for each method and data set; a run that was interrupted goes on, and one with another method
adds its rows. `--plot` draws what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks._accuracy_methods import ROOT, Method, find_methods
from benchmarks._accuracy_pairs import Pair, generated_pairs, hippocampus_pairs, real_pairs
from benchmarks._accuracy_tables import Row, print_blocks, read_blocks, read_table, write_table
from benchmarks._judge import TRUTH, judge_bundle, judge_peer, judge_zero
from benchmarks._measure import describe_machine
from benchmarks._peers import FAILED, FIGURES, PACKAGES, SYN_ITERATIONS, is_finished
from benchmarks._voxelmorph import write_overlay
from common.inference import file_sha256

DATA_SETS = ("hippocampus", "real", "generated")
_VERSIONS = ("torch", "monai", "itk", "SimpleITK", "antspyx", "convexAdam")

# Runs a command and writes its exit code and peak memory. A process of its own: Linux counts the peak of a process'
# parent at the time of its start as the process' own, and this one is small.
_LAUNCHER = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
with open(sys.argv[1], "w") as file:
    json.dump({"exit_code": os.waitstatus_to_exitcode(status), "peak_mib": peak}, file)
"""


class Comparison:
    """Runs methods on pairs and keeps a table for each method and data set.

    Args:
        folder: of everything; `tables` holds the results, `work` what methods write, `logs` what they say.
        threads: of every method.
        keep: keep what methods write after it has been judged.
        retry: try pairs again that failed.
        syn_iterations: of SyN, coarse to fine.
    """

    def __init__(
        self,
        folder: Path,
        *,
        threads: int,
        keep: bool = False,
        retry: bool = False,
        syn_iterations: Sequence[int] = SYN_ITERATIONS,
    ) -> None:
        self.folder = folder
        self.threads = threads
        self.keep = keep
        self.retry = retry
        self.syn_iterations = list(syn_iterations)

    def table(self, method: str, data_set: str) -> Path:
        return self.folder / "tables" / f"{data_set}__{method}.csv"

    def work(self, method: str, data_set: str) -> Path:
        return self.folder / "work" / data_set / method

    def compare(self, method: Method, data_set: str, pairs: Sequence[Pair]) -> None:
        """Do what the table of the method and the data set lacks."""
        self._forget_other_settings(method, data_set)
        path = self.table(method.name, data_set)
        rows = {row["id"]: row for row in read_table(path)}
        for pair in pairs:
            if self.retry and rows.get(pair["id"], {}).get("problem"):
                del rows[pair["id"]]
                shutil.rmtree(self.work(method.name, data_set) / pair["id"], ignore_errors=True)
        left = [pair for pair in pairs if pair["id"] not in rows]
        if not left:
            return
        print(f"{data_set}: {method.title}, {len(left)} of {len(pairs)} pairs to do ...", flush=True)
        started = time.perf_counter()
        problems, peak = ({}, None) if method.name == "zero" else self._run(method, data_set, left)
        for pair in left:
            folder = self.work(method.name, data_set) / pair["id"]
            if pair["id"] in problems:
                row: Row = {"problem": problems[pair["id"]]}
            else:
                try:
                    row = self._judge(method, data_set, pair, folder)
                except Exception as error:
                    row = {"problem": f"cannot be judged: {type(error).__name__}: {error}"}
            if row.get("problem"):
                print(f"  {pair['id']}: {row['problem']}")
            rows[pair["id"]] = {"id": pair["id"], "peak_mib": peak, "threads": self.threads, **row}
            write_table(path, list(rows.values()))
            if not self.keep and method.name != "affine":  # from which others start
                shutil.rmtree(folder, ignore_errors=True)
        print(f"  {time.perf_counter() - started:.0f} s in all", flush=True)

    def _judge(self, method: Method, data_set: str, pair: Pair, folder: Path) -> Row:
        if method.name == "zero":
            return judge_zero(pair)
        if method.configs:
            return judge_bundle(pair, folder)
        return judge_peer(pair, folder, self.work("affine", data_set) / pair["id"])

    def _settings(self, method: Method, data_set: str) -> dict[str, Any]:
        """What results depend on."""
        settings: dict[str, Any] = {"method": method.name}
        if method.configs:
            settings["weights"] = file_sha256(method.weights_for(data_set))
            settings["options"] = method.options_for(data_set)
        if method.name == "syn":
            settings["iterations"] = self.syn_iterations
        if method.name in PACKAGES:
            settings["version"] = version(PACKAGES[method.name][1])
        return settings

    def has_other_settings(self, method: Method, data_set: str) -> bool:
        """Whether the results that are kept were made with other weights, options or versions."""
        kept = self.work(method.name, data_set) / "settings.json"
        return kept.is_file() and json.loads(kept.read_text()) != self._settings(method, data_set)

    def _forget_other_settings(self, method: Method, data_set: str) -> None:
        """Results of other weights or options must not pass for these."""
        folder = self.work(method.name, data_set)
        if self.has_other_settings(method, data_set):
            print(f"{data_set}: {method.title} had other settings or weights; its results are made anew")
            shutil.rmtree(folder)
            self.table(method.name, data_set).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(json.dumps(self._settings(method, data_set)))

    def _run(self, method: Method, data_set: str, pairs: Sequence[Pair]) -> tuple[dict[str, str], float | None]:
        """The method's process over all pairs; after a crash another one over what comes after the crash.

        Returns:
            problems by pair, and the highest peak memory of the processes in MiB.
        """
        folder = self.work(method.name, data_set)
        problems: dict[str, str] = {}
        peak_file = folder / "peak.json"  # a run that was interrupted counts
        peaks = json.loads(peak_file.read_text()) if peak_file.is_file() else []
        left = list(pairs)
        if method.name in PACKAGES:
            for pair in pairs:
                if not (self.work("affine", data_set) / pair["id"] / FIGURES).is_file():
                    problems[pair["id"]] = "the affine stage that it starts from failed"
        while left := [pair for pair in left if pair["id"] not in problems]:
            datalist = folder / "pairs.json"
            listed = [{key: value for key, value in pair.items() if key != TRUTH} for pair in left]
            datalist.write_text(json.dumps(listed, indent=1))
            log = self.folder / "logs" / f"{data_set}__{method.name}.log"
            done = run_process(self._command(method, data_set, datalist), log=log, threads=self.threads)
            peaks.append(done["peak_mib"])
            peak_file.write_text(json.dumps(peaks))
            problems |= _told_problems(method, folder, left)
            left = [pair for pair in left if not self._finished(method, folder / pair["id"])]
            left = [pair for pair in left if pair["id"] not in problems]
            if left:
                problems[left[0]["id"]] = f"the process ended with code {done['exit_code']}; see {log}"
                print(f"  {last_lines(log)}")
                if not (folder / left[0]["id"]).exists() and method.configs:  # it never came as far as a pair
                    problems |= {pair["id"]: problems[left[0]["id"]] for pair in left}
        return problems, max(peaks) if peaks else None

    @staticmethod
    def _finished(method: Method, folder: Path) -> bool:
        return (folder / "metrics.json").is_file() if method.configs else is_finished(folder)

    def _command(self, method: Method, data_set: str, datalist: Path) -> list[str]:
        folder = datalist.parent
        if method.configs:
            overlay = write_overlay(folder / "options.json", method.options_for(data_set))
            files = json.dumps([str(path) for path in (*method.configs, overlay)])
            command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", files]
            command += ["--weights", str(method.weights_for(data_set).absolute())]
        else:
            command = [sys.executable, "-m", "benchmarks._peers", method.name]
            command += ["--affine_dir", str(self.work("affine", data_set))]
        command += ["--datalist", str(datalist), "--output_dir", str(folder)]
        if method.name == "syn":
            command += ["--syn_iterations", *map(str, self.syn_iterations)]
        return command


def run_process(command: Sequence[str], *, log: Path, threads: int) -> dict[str, Any]:
    """Run a command from the repository's root, its words into a file.

    Returns:
        `exit_code`, and `peak_mib`, the largest resident set that the system saw (`getrusage`).
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    report = log.with_suffix(".json")
    report.unlink(missing_ok=True)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **dict.fromkeys(names, str(threads)), "PYTHONPATH": path}
    with open(log, "a") as file:
        launcher = [sys.executable, "-S", "-c", _LAUNCHER, str(report), *command]
        process = subprocess.Popen(
            launcher, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, process_group=0
        )
        try:
            process.wait()
        except BaseException:  # Ctrl-C, or the signal below: the method's own process has to end as well
            os.killpg(process.pid, signal.SIGTERM)
            raise
    try:
        return json.loads(report.read_text())
    except OSError:
        raise SystemExit(f"error: the process was stopped; see {log}") from None
    finally:
        report.unlink(missing_ok=True)


def last_lines(path: Path, count: int = 3) -> str:
    with suppress(OSError):
        return "\n  ".join(path.read_text(errors="replace").strip().splitlines()[-count:])
    return ""


def _told_problems(method: Method, folder: Path, pairs: Sequence[Pair]) -> dict[str, str]:
    """What a method itself says of pairs that it could not do."""
    if method.configs:
        rows = read_table(folder / "results.csv")
        return {row["id"]: row["problem"] for row in rows if row.get("status") == "failed"}
    failed = {pair["id"]: folder / pair["id"] / FAILED for pair in pairs}
    return {name: path.read_text() for name, path in failed.items() if path.is_file()}


def describe_versions() -> str:
    texts = []
    for name in _VERSIONS:
        try:
            texts.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            texts.append(f"no {name}")
    return ", ".join(texts)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scans = os.environ.get("REGISTRATION_TEST_DATA", "../shared/data")
    parser.add_argument("--scans", type=Path, default=Path(scans), help="folder of the test scans")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--data", type=_names, default=DATA_SETS, help=f"of {','.join(DATA_SETS)}")
    parser.add_argument(
        "--methods", type=_names, help="zero,affine,syn,convexadam,recorr,recorr+io,...; all by default"
    )
    parser.add_argument("--pairs", type=_names, help="only those whose names begin so, for instance lung_mri,brain")
    parser.add_argument("--hippocampus", type=int, default=40, help="number of pairs, 40 at most")
    parser.add_argument("--generated", type=int, default=20, help="number of generated pairs")
    parser.add_argument("--generated_shape", type=int, nargs=3, default=(96, 96, 96), metavar=("D", "H", "W"))
    parser.add_argument("--weights", nargs="+", default=[], metavar="BUNDLE=PATH")
    parser.add_argument(
        "--hippocampus_weights", nargs="+", default=[], metavar="BUNDLE=PATH", help="default models/hippocampus.pt"
    )
    parser.add_argument(
        "--affine", nargs="+", default=[], metavar="MODE", help="of bundles on the Hippocampus; MODE or BUNDLE=MODE"
    )
    parser.add_argument(
        "--hippocampus_options",
        nargs="+",
        default=[],
        metavar="OPTION=VALUE",
        help="for the bundles' inference.json on the Hippocampus, for instance spacing=1.0 or recorr.spacing=1.0",
    )
    parser.add_argument("--instance_optimization", type=int, default=40, help="steps, of the rows with it")
    parser.add_argument("--voxelmorph", type=Path, help="weights of benchmarks._voxelmorph")
    parser.add_argument("--syn_iterations", type=int, nargs="+", default=SYN_ITERATIONS, help="coarse to fine")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every method")
    parser.add_argument("--keep", action="store_true", help="keep what the methods write")
    parser.add_argument("--retry", action="store_true", help="try pairs again that failed")
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    parser.add_argument("--plot", action="store_true", help="draw what is there, run nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    options = build_parser().parse_args(argv)
    for name in options.data:
        if name not in DATA_SETS:
            raise SystemExit(f"error: --data knows {', '.join(DATA_SETS)}, not '{name}'")
    options.output_dir = options.output_dir.absolute()
    print(f"{describe_machine()}; {options.threads} threads for each method")
    print(describe_versions())
    methods = find_methods(options)
    known = {method.name for method in methods} | {method.name.removesuffix("+io") for method in methods}
    for name in set(options.methods or ()) - known:
        print(f"there is no method '{name}' to run")
    comparison = Comparison(
        options.output_dir,
        threads=options.threads,
        keep=options.keep,
        retry=options.retry,
        syn_iterations=options.syn_iterations,
    )
    if options.table or options.plot:
        for data_set in options.data:
            for method in methods:
                if has_weights(method, data_set) and comparison.has_other_settings(method, data_set):
                    print(f"{data_set}: {method.title} was made with other settings or weights than these")
    else:
        run(comparison, options, methods)
    titles = {method.name: method.title for method in methods}
    blocks = read_blocks(options.output_dir, options.data, list(titles))
    if not blocks:
        raise SystemExit(f"error: there are no results in {options.output_dir}")
    if options.plot:
        from benchmarks._plots import draw

        for path in draw(blocks, titles, options.output_dir):
            print(path)
    else:
        print_blocks(blocks, titles)


def has_weights(method: Method, data_set: str) -> bool:
    return not method.configs or method.weights_for(data_set).is_file()


def run(comparison: Comparison, options: argparse.Namespace, methods: Sequence[Method]) -> None:
    """All methods on all data sets, one data set after the other."""
    folder, scans = options.output_dir, options.scans.absolute()
    for data_set in options.data:
        if data_set != "generated" and not scans.is_dir():
            print(f"{data_set} is left out: there is no folder of test scans {scans}")
            continue
        if data_set == "hippocampus":
            pairs = hippocampus_pairs(scans, options.hippocampus)
        elif data_set == "real":
            pairs = real_pairs(scans, folder / "pairs")
        else:
            pairs = generated_pairs(folder / "pairs", options.generated, options.generated_shape)
        if options.pairs:
            pairs = [pair for pair in pairs if pair["id"].startswith(tuple(options.pairs))]
        for method in methods:
            if not has_weights(method, data_set):
                continue  # said before
            if method.name in PACKAGES:
                comparison.compare(Method("affine", "affine (ours)"), data_set, pairs)
            comparison.compare(method, data_set, pairs)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: stopped"))
    main()

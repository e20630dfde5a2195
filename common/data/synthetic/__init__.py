"""Generated image pairs with an exactly known displacement field.

Random shapes, or label maps of real people, are painted with random contrasts and deformed by a random affine, a random
multi-scale diffeomorphism and, where asked for, by organs that slide along each other. In the spirit of SynthMorph
(Hoffmann et al., IEEE TMI 2022): a network that has only seen such pairs has to learn to match shapes, not the
appearance of one modality. Torch only; runs where its generator's device is.
"""

from common.data.synthetic.motion import random_field
from common.data.synthetic.pairs import SyntheticPairs, generate_pair
from common.data.synthetic.recipe import SyntheticRecipe

__all__ = ["SyntheticPairs", "SyntheticRecipe", "generate_pair", "random_field"]

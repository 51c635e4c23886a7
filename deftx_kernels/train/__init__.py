"""The driver: settings, data, recipes and reports of composable sparse fine-tuning over transformers.Trainer.

`Recipe` and `learn_vector` are for training loops and trainers of your own and need only the core. The driver's other
modules need `pip install "deftx-kernels[train]"`.
"""

from deftx_kernels.train.config import Recipe
from deftx_kernels.train.learning import learn_vector

__all__ = ["Recipe", "learn_vector"]

"""The driver: settings, data, recipes and reports of composable sparse fine-tuning over transformers.Trainer.

`config` needs only the core; the other modules need `pip install "deftx-kernels[train]"`.
"""

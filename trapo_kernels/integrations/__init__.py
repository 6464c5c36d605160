"""Adapters: the losses of this package inside other people's trainers.

    transformers.py   patch_causal_lm_loss: HF Trainer with a fused SFT, TrSFT or DFT loss

Nothing is imported here. Each module imports the framework it is named after, and no other; the package needs torch
alone.
"""

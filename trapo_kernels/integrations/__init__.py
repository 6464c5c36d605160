"""Adapters: the losses of this package inside other people's trainers.

    transformers.py   patch_causal_lm_loss: HF Trainer with a fused SFT, TrSFT or DFT loss
    trl.py            TrapoGRPOTrainer: GRPO with expert prefixes (guided_rollouts.py draws them) and the fused loss
    liger.py          FusedLinearGRPOLoss: Liger's GRPO head, and what that one refuses; grpo_terms.py has its formulas
    verl.py           an actor loss with an expert mask, in verl's registry; verl's fused head
    prime_rl.py       a loss from log-probabilities, for an import path

Nothing is imported here. A module imports the framework it is named after and no other; liger.py and prime_rl.py import
torch alone, as the package does. trl.py and guided_rollouts.py also use `trapo`, for the guidance rules.
"""

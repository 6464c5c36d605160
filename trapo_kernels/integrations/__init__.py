"""Adapters bring the losses of this package into other people's trainers.

    transformers.py   fuse(model): HF Trainer with a fused SFT, TrSFT or DFT loss
    trl/              fuse(trainer): SFT, DPO, KTO, RLOO, GRPO, distillation; FusedGRPOTrainer; TrapoGRPOTrainer, which
                      adds expert prefixes, lives in trapo/integrations/, and can be imported from here
    liger.py          FusedLinearGRPOLoss: Liger's GRPO head, and what that one refuses; grpo_terms.py has its formulas
    verl.py           an actor loss with an expert mask, in verl's registry; verl_head.py: verl's fused head, with Σπ²;
                      verl_distillation.py: a teacher's top-k with its tail
    prime_rl.py       a loss from log-probabilities, for an import path; prime_rl_head.py: prime-rl's fused head
    slime.py, skyrl.py, nemo_rl.py, torchtitan.py, trinity.py, ms_swift.py
                      losses from log-probabilities (or logits), each by its framework's own plug-in convention

Nothing is imported here. A module imports the framework it is named after and no other; liger.py and prime_rl*.py
import torch alone, as the package does. None imports `trapo` (tests/test_imports.py).
"""

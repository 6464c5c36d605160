"""This folder has what of `trapo` runs inside other people's trainers. The losses alone are in
trapo_kernels/integrations/.

trl.py              TrapoGRPOTrainer: TRL's GRPOTrainer with expert prefixes and the fused loss
verl.py             GuidedAgentLoop: verl's rollouts with expert prefixes
guided_rollouts.py  how batches of other trainers are drawn
"""

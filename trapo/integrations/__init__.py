"""This folder has what of `trapo` runs inside other people's trainers. The losses alone are in
trapo_kernels/integrations/.

trl.py              TrapoGRPOTrainer: TRL's GRPOTrainer with expert prefixes and the fused loss
guided_rollouts.py  how its batches are drawn
"""

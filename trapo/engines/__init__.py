"""This folder has what generates: one protocol, and the engines that speak it. They know token ids, not problems or
rewards."""

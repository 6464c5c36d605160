"""What generates: one protocol, and the engines that speak it. They know token ids, not problems or rewards."""

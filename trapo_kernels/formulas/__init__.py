"""This folder has the formulas that terms.py is made of: ratios of probabilities (`ratios`), the families `lco`, `dppo`
and `sapo`, functions of users (`custom`), and an objective written out as a formula (`explain`)."""

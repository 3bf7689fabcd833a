"""What surrounds a run; the method itself is in the files of the folder above.

Modules for train.py and eval.py, and commands: python -m kit.bench | build | filter | report.
"""

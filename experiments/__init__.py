"""Experiments: one program for each published system.

``python -m experiments.<system> --config=configs/<system>.py:<tier>
--workdir=DIR`` runs one, ``python -m experiments.reproduce`` all of them. What
they share is in :mod:`experiments.harness`.
"""

"""Configurations of the experiments: data only.

``configs/<system>.py`` belongs to ``experiments/<system>.py`` and defines
``get_config(tier="cpu")``, which returns a ``ConfigDict`` with the fields
``slug`` and ``tier``, the sizes of the run, ``accepted`` ranges for what is
measured, and ``timed = True`` if the clock decides. Tiers are ``smoke``
(seconds, decides nothing), ``cpu`` (decides the claim on two cores in
minutes) and ``full`` (an accelerator). Sequences are tuples, so that flags
can override them: ``--config.lengths=256,512``.
"""

"""Campaigns against everything that people bring, kill and fill up: ``make torture``.

Changed bundles, checkpoints, pictures and engines (:mod:`tests.torture.fuzz`), processes killed at a file
event (:mod:`tests.torture.kills`), full disks and bare environments (:mod:`tests.torture.places`), and two
thousand pictures in one process (:mod:`tests.torture.soak`). Every trial ends in one outcome; a seed and a
number bring any of them back.
"""

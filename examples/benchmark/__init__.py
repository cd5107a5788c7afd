"""The workshop that takes klora's numbers; no part of what is installed.

``race`` times the ways to sample with two LoRAs, ``attach`` how long a fusion takes until it acts,
``measuring`` and ``reading`` what compiling costs, ``size`` how small an artifact becomes.
``make bench`` runs all of them as the documents print them.
"""

"""klora's benchmarks; they are not installed.

``race`` times the ways to sample with two LoRAs, ``attach`` the time until a fusion acts,
``measuring`` and ``reading`` the cost of compiling, and ``size`` measures the size of artifacts.
``make bench`` runs all of them as the documentation prints them.
"""

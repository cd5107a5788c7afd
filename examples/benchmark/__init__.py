"""klora's benchmarks; they are not installed.

``race`` times the ways to sample with two LoRAs, ``attach`` the time until a fusion acts,
``measuring`` and ``reading`` the cost of compiling, ``size`` measures the size of artifacts, and
``before`` times the present tree beside an earlier commit.
``make bench`` runs all of them as the documentation prints them.
"""

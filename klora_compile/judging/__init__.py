"""Judges of pictures: who gives a search the number that it makes large.

    picture, About --judge--> a number, higher is better

A judge is any function; :mod:`klora_compile.judging.judge` finds one by name, and checks what it
answers. The judge that comes with klora compares a picture with each LoRA's own pictures.
"""

"""Trying: pictures of the same LoRAs under changing settings; nothing is loaded or measured twice.

    settings by name --trial_of--> Trial --Studio.fusion--> Fusion --Studio.picture--> Picture

``klora sweep`` and the page of ``klora tune`` are made of this.
"""

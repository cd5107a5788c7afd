"""Reading of LoRA files to adapters, with every key accounted for. In the order of the data flow:

``files`` opens a path; ``names`` maps each key to a module of diffusers' model; ``scale`` finds the
factor on its delta; ``checking`` finds problems of its tensors; ``describing`` combines these to
``pieces``, and ``survey`` to a description of the whole header. Only then are values read:
``evaluating`` converts each piece, by its form in ``forms``, to ``layers``, and ``adapter`` holds
them.
"""

"""From a LoRA file to an adapter, every key accounted for. In the order in which data passes:

``files`` opens what was named; ``names`` says which module of diffusers' model each key belongs to;
``scale`` says by which number its delta is multiplied; ``checking`` says what is wrong with its
tensors; ``describing`` puts these together to ``pieces``, and ``survey`` to all that a header
tells. Only then are numbers read: ``evaluating`` brings each piece, by its form in ``forms``, to
``layers``, and ``adapter`` holds them.
"""

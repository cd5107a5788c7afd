"""A small double of ComfyUI, written from its documented behaviour, and the tests' door to both.

Only what klora's nodes meet is here: the patcher of a model (`patching`), samplers and the loop
around them (`sampling`), key maps (`keys`), the schema of nodes (`schema`) and model folders
(`folders`). `kits` gives tests the double, or ComfyUI itself where ``KLORA_COMFYUI`` names its
folder. `tests/comfyui/test_double.py` compares the two.
"""

"""``python -m klora_compile``: the command line, for when ``klora`` is not on the path."""

from klora_compile.cli import main

if __name__ == "__main__":
    main()

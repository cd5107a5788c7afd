"""The commands of ``klora``, one file each: options in, a library call, text out."""

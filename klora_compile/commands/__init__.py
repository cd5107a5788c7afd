"""The commands of ``klora``, one file each: parse options, call the library, print the result."""

"""The present tree beside an earlier commit: ``make bench-before ARGS=COMMIT``.

``cases`` lists what is timed, ``trees`` runs both trees as processes, ``worker`` is the program
inside them, and ``command`` takes turns and prints the table.
"""

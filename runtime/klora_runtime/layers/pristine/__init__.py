"""The base values of changed parameters: every write starts from them, and removal restores them.

`values` has the value of each parameter, whatever its source:

* `copies`: a copy in memory, taken before the first change.
* `checkpoint`: the file that the model was loaded from, read back at each write. `held_files` keeps
  such files open, and makes sure that they do not change meanwhile.

A new source is a new file here, and a line in `values`.
"""

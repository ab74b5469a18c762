"""An experiment that crashes before it has done anything."""

raise RuntimeError("this toy always <crashes>")

"""Reports of runs, and a viewer of traces: in a browser, as a file, and in a terminal."""

"""A seeded, bounded search for inputs and moments that break the kit: `make fuzz`.

`rasters` makes band files, whole and damaged. `runs` hands them to solution.py and to `prep competition` and
judges what comes out; `hkh` does so for `prep hkh`. `kills` ends processes at random moments. `load` counts
memory over many tiles.
"""

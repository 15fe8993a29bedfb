"""Everything around a training run, one file per subject.

script      how a script begins and ends       flags   the settings, in one table
start       how a run begins                   ranks   the processes of torchrun; how a run is told to stop
files       saved models and states on disk    log     what is printed and logged
checkpoint  a run written and put back         curves  logs read back, for plot.py
check_state the parts of a state, before they are used
"""

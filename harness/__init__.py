"""What surrounds a training run, one room for each kind of thing; here is what scripts take from it.

flags    the settings, in one table          files    saved models and states on disk
script   how a script begins and ends        run      what training changes, and how it is resumed
position where a run stands                  curves   logs read back, for plot.py
log      what is printed and logged          start    how a run begins
ranks    the processes of torchrun, how a run is told to stop
"""

from corpus.files import read_lines as read_lines
from harness.files import check_writable as check_writable
from harness.files import open_model as open_model
from harness.files import write as write
from harness.flags import COUNT as COUNT
from harness.flags import POSITIVE as POSITIVE
from harness.flags import SEED as SEED
from harness.flags import SWITCH as SWITCH
from harness.flags import ArgumentParser as ArgumentParser
from harness.flags import Flag as Flag
from harness.flags import number as number
from harness.flags import parse_evaluation as parse_evaluation
from harness.log import DOUBLE_RULE as DOUBLE_RULE
from harness.log import RunLog as RunLog
from harness.log import figures as figures
from harness.log import ppl as ppl
from harness.log import say as say
from harness.script import run_script as run_script

"""The kinds of tasks that a task file can return."""

from lmx.eval.tasks.bias import CrowsPairs as CrowsPairs
from lmx.eval.tasks.bias import StereoSet as StereoSet
from lmx.eval.tasks.choice import MultipleChoice as MultipleChoice
from lmx.eval.tasks.classify import Classification as Classification
from lmx.eval.tasks.extractive import ExtractiveQa as ExtractiveQa
from lmx.eval.tasks.generation import Generation as Generation
from lmx.eval.tasks.task import Task as Task

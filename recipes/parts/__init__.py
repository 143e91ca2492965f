"""What the recipes' scripts share.

command_line  flags and mistakes: one parser for all scripts, one sentence for each mistake
arguments     what can be set in a recipe: the keys of the YAMLs in configs/
saving        checkpoints and adapters of a run, as they are written
curves        how a run went, as a picture
sources       files, folders and hub data sets, as samples
bad_sample    what is wrong with a sample that cannot be used
questions     a question with its options, its answer, and the chain of thought beside it
layouts       a sample of any layout -> messages and images
images        pictures, wherever they lie
loading       the usable samples of a source, as TRL takes them, and a count of the others
template      what the chat template makes of an answer
lengths       how many tokens a conversation has, and which are too long
parquet       messages and images in one file that stands alone
teachers      who writes chains of thought: a model in this process, or a server
journal       answers on disk as they come
answers       what counts as the right answer
scoring       the frozen scorer: the final answer of a response, and whether it is right
outputs       results of VLMEvalKit, lmms-eval and evaluate.py, read and written
"""

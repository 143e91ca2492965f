"""What the recipes' scripts share.

interrupt     Ctrl-C while a script is still importing
command_line  flags and mistakes: one parser for all scripts, one sentence for each mistake
arguments     what can be set in a recipe: the keys of the YAMLs in configs/
checkpoints   which checkpoints are whole, and so what training goes on from
saving        checkpoints and adapters of a run, as they are written
curves        how a run went, as a picture
sources       files, folders and hub data sets, as samples
layouts       a sample of any layout -> messages and images
images        pictures, wherever they lie
loading       the usable samples of a source, as TRL takes them, and a count of the others
lengths       how many tokens a conversation has, and which are too long
parquet       messages and images in one file that stands alone
teachers      who writes chains of thought: a model in this process, or a server
journal       answers on disk as they come
answers       what counts as the right answer
scoring       the frozen scorer: the final answer of a response, and whether it is right
intervals     means, and their 95 % intervals by a bootstrap over samples
ways          what a comparison compares: what each way changes in a recipe
search        settings of the leading ways, tuned with optuna
frontier      task against keeping: which ways nothing beats, which one to take, the picture
choice        what a comparison says: numbers, table, and the recipe of the way to take
outputs       results of VLMEvalKit, lmms-eval and evaluate.py, read and written
"""

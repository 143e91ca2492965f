"""What the recipes' scripts share.

command_line  flags and mistakes: one parser for all scripts, one sentence for each mistake
arguments     what can be set in a recipe: the keys of the YAMLs in configs/
rehearsal     what Trainer makes of its settings in the end, made first of next to nothing
checkpoints   which checkpoints are whole, and so what training goes on from
trained_with  what a checkpoint was trained with, and goes on with alone
saving        checkpoints and adapters of a run, as they are written
curves        how a run went, as a picture
sources       files, folders and hub data sets, as samples
bad_sample    what is wrong with a sample that cannot be used
questions     a question with its options, its answer, and the chain of thought beside it
layouts       a sample of any layout -> messages and images
images        pictures, wherever they lie
trained       an answer as it is trained: its chain of thought ends, and no end token is in it
loading       the usable samples of a source, as TRL takes them, and a count of the others
processing    what the processor of a run is told: its settings, and the chat template
template      what the chat template makes of an answer
lengths       how many tokens a conversation has, and which are too long
training_data  the samples of a run, loaded and told, then as the trainer takes them
replay        the answers of a keep set among the training samples
parquet       messages and images in one file that stands alone
teachers      who writes chains of thought: a model in this process, or a server
journal       answers on disk as they come
stamp         whether a path still holds the model, prior or keep set that has answered
reading       what a response, or a known answer, gives as its answer, and by which rule
options       the options of a question, and the letters that name them
units         a value and its unit
plain         an answer without what changes only its looks
numerals      numbers, dates and times in words
equality      whether two answers are the same
answers       whether a response is right: read, and compared in a process of its own
loose         known answers that are sentences, lists or objects, which an exam cannot mark well
scoring       the frozen scorer, and what stands for its version
intervals     means, and their 95 % intervals by a bootstrap over samples
ways          what a comparison compares: what each way changes in a recipe
launch        scripts that a script runs in processes of their own
search        settings of the leading ways, tuned with optuna
held_out      a comparison's samples: read, and split so that exams and training have no image or question in common
pace          what is said of the exams to come, and how long they take
frontier      task against keeping: what was measured, which ways nothing beats, which one to take, the picture
choice        what a comparison says: numbers, table, and the recipe of the way to take
outputs       results of VLMEvalKit, lmms-eval and evaluate.py, as they are read
asked_models  the models that reproduce_drift.sh asks, and a mark of each beside its answers
reproduced    whether reproduce_drift.sh can train a recipe in each of its ways, and ask it
eval_settings  what reproduce_drift.sh asks beside what it trains, and with which settings
"""

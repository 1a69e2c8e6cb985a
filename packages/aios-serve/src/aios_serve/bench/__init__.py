"""`aios-bench`: how fast is it, beside others and beside the limit of the machine?

work          what is measured, by name                engines       whom and with which settings
environments  peers installed apart                    model_files   one model in every engine's form
runners/      what runs inside a peer's environment    samples       one measurement in a fresh process
rounds        everything in alternation                summary       medians, spread and ratios
tables, chart what is shown                            peers         from options to files
limits        what the machine can do at best          roofline      how much of it is reached
"""

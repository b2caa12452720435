"""What quantised forms of a finished build keep of its edit: the command, its work, its results.

Nothing is imported here: the record stage reads the results, and the command runs that stage.
"""

"""What each verb of the command line does; imported when the verb runs, since some are heavy."""

"""What a user can mend: the one exception whose text is shown without a traceback."""


class UserError(Exception):
    """Input, configuration or data from the user is wrong.

    The text names the file, key, line or rank, what was found and what would work. The command
    line prints it alone and leaves with `exit_codes.BAD_INPUT`.
    """

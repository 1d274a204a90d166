"""One file a command; `verbs` reads their arguments."""

"""SuperGLUE, few-shot and supervised: the paper's section 5."""

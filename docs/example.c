/* A matrix is quantized to nf4, multiplied with a vector, and a token is drawn from the result:
 *     python setup.py static_library --folder build/c
 *     cc docs/example.c -Ibuild/c/include -Lbuild/c -lqllm -lm -lpthread -o example && ./example */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <qllm.h>

enum { ROWS = 512, COLS = 256 };

/* Numbers between -1 and 1 that look random enough. */
static void fill(float *values, int n, unsigned seed)
{
    for (int i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        values[i] = (float)(seed >> 8) / (1 << 23) - 1;
    }
}

int main(void)
{
    static float weights[ROWS * COLS], read_back[ROWS * COLS], x[COLS], exact[ROWS], logits[ROWS];
    char text[QLLM_TEXT] = "";
    qllm_engine *engine = NULL;
    qllm_matrix *matrix = NULL;
    qllm_draw_options options = qllm_draw_defaults();
    qllm_drawn drawn;
    qllm_comparison difference;
    fill(weights, ROWS * COLS, 1);
    fill(x, COLS, 2);
    options.temperature = 0.7;
    options.top_k = 50;

    int failed = qllm_engine_create(NULL, &engine, text) ||
                 qllm_matrix_quantize(engine, weights, "float32", ROWS, COLS, "nf4", 64, &matrix,
                                      text) ||
                 qllm_matrix_dequantize(engine, matrix, read_back, text) ||
                 qllm_matrix_multiply(engine, matrix, x, 1, NULL, logits, text) ||
                 qllm_draw_token(engine, logits, ROWS, &options, NULL, 0, 0, &drawn, text);
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COLS; c++)
            exact[r] += weights[r * COLS + c] * x[c];
    failed = failed || qllm_compare_logits(engine, exact, logits, ROWS, 1, &difference, text);
    if (!failed) {
        printf("%s, %d threads, %s\n", qllm_engine_isa(engine), qllm_engine_threads(engine),
               qllm_matrix_kernel(engine, matrix, 1));
        printf("%lld bytes for %d weights; %.3f read back as %.3f\n",
               (long long)qllm_matrix_bytes(matrix), ROWS * COLS, weights[0], read_back[0]);
        printf("token %lld, log-probability %.3f; KL from the exact product %.4f nats\n",
               (long long)drawn.token, drawn.logprob, difference.kl);
    }
    qllm_matrix_free(matrix);
    qllm_engine_free(engine);
    if (failed)
        fprintf(stderr, "%s\n", text);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}

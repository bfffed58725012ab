/* A matrix of bfloat16 times one vector, at the speed of memory: decode.py, DecodeLinear. */
#include "numbers.h"

#define LANES 64            /* sums side by side: independent of each other, so that they become vectors */
#define AHEAD 2048          /* bytes that are asked for before they are needed */

/* Two bfloat16 are read as one 32-bit number, and its halves are put, or left, above sixteen zeros: x comes
   apart into its even and odd elements, n of each. */
#define LOW(u) bits((u) << 16)
#define HIGH(u) bits((u) & 0xffff0000u)

/* Two rows of a matrix times x. A core reads faster in two places at once. */
static inline void dots(long n, const uint32_t *v, const uint32_t *w, const float *e, const float *o,
                        float *vx, float *wx) {
    float s[LANES] = {0}, t[LANES] = {0}, a = 0, b = 0;
    long k = 0;
    for (; k + LANES <= n; k += LANES) {
        for (int ahead = AHEAD; ahead < AHEAD + 4 * LANES; ahead += 64) {
            __builtin_prefetch((const char *)(v + k) + ahead);
            __builtin_prefetch((const char *)(w + k) + ahead);
        }
        #pragma omp simd
        for (int j = 0; j < LANES; j++) {
            s[j] += LOW(v[k + j]) * e[k + j] + HIGH(v[k + j]) * o[k + j];
            t[j] += LOW(w[k + j]) * e[k + j] + HIGH(w[k + j]) * o[k + j];
        }
    }
    for (; k < n; k++) {
        a += LOW(v[k]) * e[k] + HIGH(v[k]) * o[k];
        b += LOW(w[k]) * e[k] + HIGH(w[k]) * o[k];
    }
    #pragma omp simd reduction(+:a,b)
    for (int j = 0; j < LANES; j++) a += s[j], b += t[j];
    *vx = a, *wx = b;
}

/* y = W x + bias; W [rows, 2n], bias may be missing */
void linear(long rows, long n, const uint32_t *x, const uint32_t *W, const uint16_t *bias, uint16_t *y) {
    float e[n], o[n];
    for (long k = 0; k < n; k++) e[k] = LOW(x[k]), o[k] = HIGH(x[k]);
    const float *even = e, *odd = o;
    long half = (rows + 1) / 2;
    #pragma omp parallel for
    for (long r = 0; r < half; r++) {
        long q = r + half < rows ? r + half : r;
        float a, b;
        dots(n, W + r * n, W + q * n, even, odd, &a, &b);
        y[r] = store(bias ? a + load(bias[r]) : a);
        if (q != r) y[q] = store(bias ? b + load(bias[q]) : b);
    }
}

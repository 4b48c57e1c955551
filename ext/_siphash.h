/* SipHash-2-4 with 128 bits (Aumasson, Bernstein: SipHash: a fast short-input PRF, INDOCRYPT 2012).
 *
 * Under a secret key nobody can choose two texts with one value, and a text cannot be found from its value. Python's own
 * hash of bytes has 64 bits, which is for tables that compare; BLAKE2 by way of hashlib takes 40 times as long.
 */
#ifndef VR_SIPHASH_H
#define VR_SIPHASH_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define VR_ROTATE(x, by) (((x) << (by)) | ((x) >> (64 - (by))))

static inline void vr_sip_round(uint64_t v[4]) {
    v[0] += v[1]; v[1] = VR_ROTATE(v[1], 13) ^ v[0]; v[0] = VR_ROTATE(v[0], 32);
    v[2] += v[3]; v[3] = VR_ROTATE(v[3], 16) ^ v[2];
    v[0] += v[3]; v[3] = VR_ROTATE(v[3], 21) ^ v[0];
    v[2] += v[1]; v[1] = VR_ROTATE(v[1], 17) ^ v[2]; v[2] = VR_ROTATE(v[2], 32);
}

static inline uint64_t vr_sip_word(const unsigned char *p, size_t size) {
    uint64_t word = 0;
    size_t i;
    for (i = 0; i < size; i++) word |= (uint64_t)p[i] << (8 * i);
    return word;
}

static inline void vr_sip_take(uint64_t v[4], uint64_t word) {
    v[3] ^= word;
    vr_sip_round(v);
    vr_sip_round(v);
    v[0] ^= word;
}

/* The 16 bytes of `text` under the 16 bytes of `key`. */
static inline void vr_siphash(const unsigned char *key, const unsigned char *text, size_t size, unsigned char *out) {
    uint64_t k0 = vr_sip_word(key, 8), k1 = vr_sip_word(key + 8, 8);
    uint64_t v[4] = {k0 ^ 0x736f6d6570736575ull, k1 ^ 0x646f72616e646f6dull ^ 0xee, k0 ^ 0x6c7967656e657261ull,
                     k1 ^ 0x7465646279746573ull};
    size_t at;
    int half, i;
    for (at = 0; at + 8 <= size; at += 8) vr_sip_take(v, vr_sip_word(text + at, 8));
    vr_sip_take(v, vr_sip_word(text + at, size - at) | (uint64_t)size << 56);
    v[2] ^= 0xee;
    for (half = 0; half < 2; half++) {
        uint64_t word;
        for (i = 0; i < 4; i++) vr_sip_round(v);
        word = v[0] ^ v[1] ^ v[2] ^ v[3];
        for (i = 0; i < 8; i++) out[8 * half + i] = (unsigned char)(word >> (8 * i));
        v[1] ^= 0xdd;
    }
}

#endif

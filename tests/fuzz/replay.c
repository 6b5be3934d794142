/* replay.c - runs a fuzz target over files, in place of libFuzzer: `fuzz_image_replay FILE...` */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        FILE *file = fopen(argv[i], "rb");
        if (!file || fseek(file, 0, SEEK_END)) {
            perror(argv[i]);
            return 1;
        }
        const long n = ftell(file);
        uint8_t *data = malloc(n > 0 ? (size_t)n : 1); /* of its exact size, so that a read behind the end is seen */
        rewind(file);
        if (n < 0 || !data || fread(data, 1, (size_t)n, file) != (size_t)n) {
            perror(argv[i]);
            return 1;
        }
        fclose(file);
        fprintf(stderr, "%s\n", argv[i]); /* the last one named is the one that broke */
        LLVMFuzzerTestOneInput(data, (size_t)n);
        free(data);
    }
    printf("%d inputs\n", argc - 1);
    return 0;
}

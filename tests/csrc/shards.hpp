// Random pictures and tars, written for the core's own tests.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include <jpeglib.h>

inline std::mt19937 rng;

inline int below(int n) { return static_cast<int>(rng() % static_cast<unsigned>(n)); }

inline std::string folder;

inline std::string write_file(const std::string& name, const std::string& bytes) {
    const std::string path = folder + "/" + name;
    std::ofstream(path, std::ios::binary) << bytes;
    return path;
}

// A smooth picture with some noise, so that neighbouring pixels differ and JPEG still works as on photographs.
inline std::string jpeg(int width, int height, int sampling, bool progressive) {
    jpeg_compress_struct info;
    jpeg_error_mgr errors;
    info.err = jpeg_std_error(&errors);
    jpeg_create_compress(&info);
    unsigned char* out = nullptr;
    unsigned long size = 0;
    jpeg_mem_dest(&info, &out, &size);
    info.image_width = static_cast<JDIMENSION>(width);
    info.image_height = static_cast<JDIMENSION>(height);
    info.input_components = 3;
    info.in_color_space = JCS_RGB;
    jpeg_set_defaults(&info);
    jpeg_set_quality(&info, 90, TRUE);
    info.comp_info[0].h_samp_factor = sampling == 0 ? 1 : 2;
    info.comp_info[0].v_samp_factor = sampling == 2 ? 2 : 1;
    if (progressive) jpeg_simple_progression(&info);
    jpeg_start_compress(&info, TRUE);
    std::vector<JSAMPLE> row(static_cast<std::size_t>(3 * width));
    const int phase = below(100);
    for (int y = 0; y < height; ++y) {
        for (int i = 0; i < 3 * width; ++i) {
            const double wave = 110 * std::sin((i / 3 + phase) * 0.05 * (i % 3 + 1)) * std::cos(y * 0.07 + i % 3);
            row[static_cast<std::size_t>(i)] = static_cast<JSAMPLE>(std::clamp(128 + wave + below(60) - 30, 0.0, 255.0));
        }
        JSAMPROW rows = row.data();
        jpeg_write_scanlines(&info, &rows, 1);
    }
    jpeg_finish_compress(&info);
    std::string encoded(reinterpret_cast<char*>(out), size);
    jpeg_destroy_compress(&info);
    std::free(out);
    return encoded;
}

// One member with its header, as POSIX has it.
inline std::string member(const std::string& name, const std::string& bytes, char type = '0') {
    std::string record(512, '\0');
    record.replace(0, std::min<std::size_t>(name.size(), 100), name, 0, 100);
    char size[13];
    std::snprintf(size, sizeof size, "%011zo", bytes.size());
    record.replace(124, 11, size);
    record[156] = type;
    record.replace(257, 8, std::string("ustar\00000", 8));
    record.replace(148, 8, 8, ' ');
    unsigned sum = 0;
    for (const char byte : record) sum += static_cast<unsigned char>(byte);
    char digits[8];
    std::snprintf(digits, sizeof digits, "%06o", sum);
    record.replace(148, 7, digits, 7);
    return record + bytes + std::string((512 - bytes.size() % 512) % 512, '\0');
}

inline const std::string kEnd(1024, '\0');

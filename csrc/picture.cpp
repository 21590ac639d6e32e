#include "picture.hpp"

#include <csetjmp>
#include <cstdio>
#include <cstring>

// jpeglib.h needs size_t and FILE declared before it.
#include <jpeglib.h>
#include <png.h>
#include <webp/decode.h>
#include <webp/demux.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#ifndef LIBJPEG_TURBO_VERSION
#error "jpeglib.h is not libjpeg-turbo's: Debian has it in libjpeg62-turbo-dev"
#endif

namespace efficientclip {
namespace {

constexpr const char* kUndecodable = "undecodable image";
constexpr const char* kTruncated = "truncated image";
constexpr const char* kTooManyScans = "progressive image of too many scans";

// Rows handed on at once: few enough to stay in the first cache.
constexpr int kRows = 8;
constexpr std::size_t kVector = 64;
// Interpolating chroma at the edge of a window needs a neighbour that is outside.
constexpr int kMargin = 4;
// A progressive picture of some kilobytes can hold thousands of scans, each as long to decode as the picture.
constexpr int kMaxScans = 500;
// Of all scans together: ten of the largest picture are usual, and it may have four times as many.
constexpr std::int64_t kMaxScannedPixels = 40 * kMaxPixels;
constexpr png_uint_32 kMaxPngSide = 1'000'000;
constexpr png_alloc_size_t kMaxPngChunk = 16 * 1024 * 1024;

struct Bytes {
    const std::uint8_t* data = nullptr;
    std::size_t size = 0;
};

// How many marks of a scan's beginning there are; coded data holds none.
std::int64_t scans_of(Bytes encoded) {
    std::int64_t scans = 0;
    const std::uint8_t *at = encoded.data, *end = encoded.data + encoded.size;
    for (;;) {
        at = std::find(at, end, 0xFF);
        if (end - at < 2) return scans;
        scans += *++at == 0xDA ? 1 : 0;
    }
}

// The orientation in a TIFF header's first folder, whatever its value.
std::optional<std::uint32_t> exif_orientation(Bytes exif) {
    constexpr std::uint8_t kPrefix[] = {'E', 'x', 'i', 'f', 0, 0};
    if (exif.size >= sizeof kPrefix && std::memcmp(exif.data, kPrefix, sizeof kPrefix) == 0) {
        exif = {exif.data + sizeof kPrefix, exif.size - sizeof kPrefix};
    }
    if (exif.size < 8) return std::nullopt;
    const bool little = exif.data[0] == 'I';
    const auto number = [&](std::size_t at, int bytes) {
        std::uint32_t value = 0;
        for (int i = 0; i < bytes; ++i) {
            const std::uint32_t byte = exif.data[at + static_cast<std::size_t>(little ? bytes - 1 - i : i)];
            value = value << 8 | byte;
        }
        return value;
    };
    if (number(2, 2) != 42) return std::nullopt;
    const std::size_t folder = number(4, 4);
    if (folder + 2 > exif.size) return std::nullopt;
    const std::size_t entries = number(folder, 2);
    for (std::size_t i = 0; i < entries; ++i) {
        const std::size_t entry = folder + 2 + 12 * i;
        if (entry + 12 > exif.size) return std::nullopt;
        constexpr std::uint32_t kOrientation = 0x0112;
        if (number(entry, 2) == kOrientation) return number(entry + 8, 2);
    }
    return std::nullopt;
}

// What stands in XMP as an attribute or an element.
std::optional<std::uint32_t> xmp_orientation(Bytes xmp) {
    constexpr std::string_view kName = "tiff:Orientation";
    std::string_view left(reinterpret_cast<const char*>(xmp.data), xmp.size);
    for (std::size_t at; (at = left.find(kName)) != left.npos;) {
        left.remove_prefix(at + kName.size());
        const std::size_t begin = left.substr(0, 2) == "=\"" ? 2 : left.substr(0, 1) == ">" ? 1 : left.npos;
        if (begin < left.size() && left[begin] >= '0' && left[begin] <= '9') {
            return static_cast<std::uint32_t>(left[begin] - '0');
        }
    }
    return std::nullopt;
}

// As Pillow has it: XMP is asked where EXIF has no such tag; 1 where both say nothing or what is none.
int orientation_of(Bytes exif, Bytes xmp) {
    std::optional<std::uint32_t> found = exif_orientation(exif);
    if (!found) found = xmp_orientation(xmp);
    return found && *found >= 1 && *found <= 8 ? static_cast<int>(*found) : 1;
}

// Pillow's rounding division by 255.
std::uint8_t over_255(std::uint32_t product) {
    product += 128;
    return static_cast<std::uint8_t>((product + (product >> 8)) >> 8);
}

void lay_over_white(std::uint8_t* pixels, int count) {
    for (int i = 0; i < count; ++i, pixels += 4) {
        const std::uint32_t alpha = pixels[3];
        for (int c = 0; c < 3; ++c) pixels[c] = over_255(pixels[c] * alpha + 255 * (255 - alpha));
    }
}

// Adobe's inverted CMYK, which is what JPEG files hold.
void cmyk_to_rgb(std::uint8_t* pixels, int count) {
    for (int i = 0; i < count; ++i, pixels += 4) {
        const std::uint32_t white = pixels[3];
        for (int c = 0; c < 3; ++c) {
            pixels[c] = static_cast<std::uint8_t>(white - over_255((255u - pixels[c]) * white));
        }
    }
}

// Hands on the rows of a picture that is in memory as a whole.
void send_rows(const std::uint8_t* first, std::size_t stride, int count, RowSink& sink) {
    const std::uint8_t* rows[kRows];
    for (int done = 0; done < count;) {
        const int block = std::min(kRows, count - done);
        for (int i = 0; i < block; ++i) rows[i] = first + static_cast<std::size_t>(done + i) * stride;
        sink.rows(rows, block);
        done += block;
    }
}

// libjpeg returns errors by longjmp, over its own frames alone: what is jumped over in ours has no destructors.
class Jpeg {
  public:
    Jpeg() {
        info_.err = jpeg_std_error(&errors_.base);
        errors_.base.error_exit = [](j_common_ptr info) {
            std::longjmp(reinterpret_cast<Errors*>(info->err)->jump, 1);
        };
        // Warnings of corrupt data: Pillow shows what was decoded, and so do we.
        errors_.base.emit_message = [](j_common_ptr, int) {};
        errors_.base.output_message = [](j_common_ptr) {};
        if (setjmp(errors_.jump) != 0) throw BadPicture{kUndecodable};
        jpeg_create_decompress(&info_);
        jpeg_save_markers(&info_, JPEG_APP0 + 1, 0xFFFF);
        info_.client_data = this;
        source_.init_source = [](j_decompress_ptr) {};
        source_.term_source = [](j_decompress_ptr) {};
        source_.resync_to_restart = jpeg_resync_to_restart;
        source_.fill_input_buffer = [](j_decompress_ptr info) -> boolean { return fail_truncated(info); };
        source_.skip_input_data = [](j_decompress_ptr info, long count) {
            if (count <= 0) return;
            if (static_cast<std::size_t>(count) > info->src->bytes_in_buffer) fail_truncated(info);
            info->src->next_input_byte += count;
            info->src->bytes_in_buffer -= static_cast<std::size_t>(count);
        };
        progress_.progress_monitor = [](j_common_ptr info) {
            if (reinterpret_cast<j_decompress_ptr>(info)->input_scan_number > kMaxScans) info->err->error_exit(info);
        };
    }
    ~Jpeg() { jpeg_destroy_decompress(&info_); }
    Jpeg(const Jpeg&) = delete;
    Jpeg& operator=(const Jpeg&) = delete;

    PictureInfo open(Bytes encoded) {
        jpeg_abort_decompress(&info_);
        errors_.cause = kUndecodable;
        if (setjmp(errors_.jump) != 0) throw BadPicture{errors_.cause};
        source_.next_input_byte = encoded.data;
        source_.bytes_in_buffer = encoded.size;
        info_.src = &source_;
        info_.progress = &progress_;
        jpeg_read_header(&info_, TRUE);
        const std::int64_t pixels = std::int64_t{info_.image_width} * info_.image_height;
        if (info_.progressive_mode && scans_of(encoded) * pixels > kMaxScannedPixels) throw BadPicture{kTooManyScans};
        Bytes exif, xmp;
        for (jpeg_saved_marker_ptr marker = info_.marker_list; marker != nullptr; marker = marker->next) {
            constexpr char kExif[] = "Exif\0", kXmp[] = "http://ns.adobe.com/xap/1.0/";
            const auto starts = [&](const char* with, std::size_t length) {
                return marker->data_length >= length && std::memcmp(marker->data, with, length) == 0;
            };
            if (exif.size == 0 && starts(kExif, sizeof kExif)) exif = {marker->data, marker->data_length};
            if (starts(kXmp, sizeof kXmp)) xmp = {marker->data, marker->data_length};
        }
        return {static_cast<int>(info_.image_width), static_cast<int>(info_.image_height), orientation_of(exif, xmp), true};
    }

    void decode(const Window& window, int eighths, int readable, RowSink& sink) {
        if (setjmp(errors_.jump) != 0) throw BadPicture{errors_.cause};
        const bool cmyk = info_.num_components == 4;
        if (info_.num_components == 2 || info_.num_components > 4) throw BadPicture{kUndecodable};
        info_.out_color_space = cmyk ? JCS_CMYK : JCS_EXT_RGBX;
        info_.scale_num = static_cast<unsigned>(eighths);
        info_.scale_denom = 8;
        jpeg_start_decompress(&info_);

        JDIMENSION left = static_cast<JDIMENSION>(std::max(0, window.left - kMargin));
        JDIMENSION width =
            std::min(info_.output_width, static_cast<JDIMENSION>(window.right + kMargin)) - left;
        if (width < info_.output_width) jpeg_crop_scanline(&info_, &left, &width);
        const std::size_t length = 4 * (static_cast<std::size_t>(width) + static_cast<std::size_t>(readable));
        const std::size_t stride = (length + kVector - 1) / kVector * kVector;
        if (lines_.size() < kRows * stride + 2 * kVector) lines_.resize(kRows * stride + 2 * kVector);
        // To aligned rows libjpeg-turbo writes around the caches, and reading them costs an eighth of the decoding.
        const auto unaligned = 4 + (0 - reinterpret_cast<std::uintptr_t>(lines_.data())) % kVector;
        JSAMPROW lines[kRows];
        const std::uint8_t* rows[kRows];
        const std::size_t offset = 4 * (static_cast<std::size_t>(window.left) - left);
        for (int i = 0; i < kRows; ++i) {
            lines[i] = lines_.data() + unaligned + static_cast<std::size_t>(i) * stride;
            rows[i] = lines[i] + offset;
        }

        if (window.top > 0) jpeg_skip_scanlines(&info_, static_cast<JDIMENSION>(window.top));
        for (int left_over = window.bottom - window.top; left_over > 0;) {
            const int block = std::min(kRows, left_over);
            for (int have = 0; have < block;) {
                have += static_cast<int>(
                    jpeg_read_scanlines(&info_, lines + have, static_cast<JDIMENSION>(block - have)));
            }
            if (cmyk) {
                for (int i = 0; i < block; ++i) cmyk_to_rgb(lines[i] + offset, window.right - window.left);
            }
            sink.rows(rows, block);
            left_over -= block;
        }
        // What is below the window need not be decoded, but must be there.
        if (info_.output_scanline == info_.output_height) {
            jpeg_finish_decompress(&info_);
        } else if (!jpeg_input_complete(&info_) && !end_follows()) {
            throw BadPicture{kTruncated};
        }
    }

  private:
    struct Errors {
        jpeg_error_mgr base;
        std::jmp_buf jump;
        const char* cause;
    };

    static boolean fail_truncated(j_decompress_ptr info) {
        auto* errors = reinterpret_cast<Errors*>(info->err);
        errors->cause = kTruncated;
        std::longjmp(errors->jump, 1);
    }

    bool end_follows() const {
        constexpr int kEndOfImage = 0xD9;
        if (info_.unread_marker == kEndOfImage) return true;
        const std::uint8_t* at = info_.src->next_input_byte;
        const std::uint8_t* end = at + info_.src->bytes_in_buffer;
        while (at < end) {
            at = static_cast<const std::uint8_t*>(std::memchr(at, 0xFF, static_cast<std::size_t>(end - at)));
            if (at == nullptr) return false;
            ++at;
            if (at < end && *at == kEndOfImage) return true;
        }
        return false;
    }

    jpeg_decompress_struct info_{};
    Errors errors_{};
    jpeg_source_mgr source_{};
    jpeg_progress_mgr progress_{};
    std::vector<std::uint8_t> lines_;
};

class Png {
  public:
    ~Png() { close(); }

    PictureInfo open(Bytes encoded) {
        close();
        left_ = encoded;
        truncated_ = false;
        // libpng's own handlers print to the standard error.
        png_ = png_create_read_struct(
            PNG_LIBPNG_VER_STRING, this, [](png_structp png, png_const_charp) { png_longjmp(png, 1); },
            [](png_structp, png_const_charp) {});
        if (png_ == nullptr || (info_ = png_create_info_struct(png_)) == nullptr) throw BadPicture{kUndecodable};
        if (setjmp(png_jmpbuf(png_)) != 0) throw BadPicture{truncated_ ? kTruncated : kUndecodable};
        png_set_read_fn(png_, this, [](png_structp png, png_bytep out, std::size_t count) {
            auto* self = static_cast<Png*>(png_get_io_ptr(png));
            if (count > self->left_.size) {
                self->truncated_ = true;
                png_error(png, "");
            }
            std::memcpy(out, self->left_.data, count);
            self->left_ = {self->left_.data + count, self->left_.size - count};
        });
        png_set_user_limits(png_, kMaxPngSide, kMaxPngSide);
        png_set_chunk_malloc_max(png_, kMaxPngChunk);
        png_read_info(png_, info_);
        return {static_cast<int>(png_get_image_width(png_, info_)),
                static_cast<int>(png_get_image_height(png_, info_)), orientation(), false};
    }

    void decode(const Window& window, int readable, RowSink& sink) {
        if (setjmp(png_jmpbuf(png_)) != 0) throw BadPicture{truncated_ ? kTruncated : kUndecodable};
        const bool transparent = (png_get_color_type(png_, info_) & PNG_COLOR_MASK_ALPHA) != 0 ||
                                 png_get_valid(png_, info_, PNG_INFO_tRNS) != 0;
        png_set_expand(png_);
        png_set_strip_16(png_);
        png_set_gray_to_rgb(png_);
        png_set_add_alpha(png_, 0xFF, PNG_FILLER_AFTER);
        const int passes = png_set_interlace_handling(png_);
        png_read_update_info(png_, info_);

        const int width = static_cast<int>(png_get_image_width(png_, info_));
        const int height = static_cast<int>(png_get_image_height(png_, info_));
        // An interlaced picture comes in passes over all rows.
        const int rows = passes > 1 ? height : 1;
        const std::size_t stride = 4 * static_cast<std::size_t>(width);
        const std::size_t wanted = static_cast<std::size_t>(rows) * stride + 4 * static_cast<std::size_t>(readable);
        pixels_.resize(wanted);
        const int visible = window.right - window.left;
        for (int pass = 0; pass < passes; ++pass) {
            for (int y = 0; y < height; ++y) {
                std::uint8_t* row = pixels_.data() + static_cast<std::size_t>(rows > 1 ? y : 0) * stride;
                png_read_row(png_, row, nullptr);
                if (pass < passes - 1 || y < window.top || y >= window.bottom) continue;
                std::uint8_t* first = row + 4 * static_cast<std::size_t>(window.left);
                if (transparent) lay_over_white(first, visible);
                send_rows(first, stride, 1, sink);
            }
        }
        // Most pictures fit in a row or two: the memory of a large one is not kept.
        if (rows > 1) pixels_ = {};
    }

  private:
    void close() { png_destroy_read_struct(&png_, &info_, nullptr); }

    // From the chunk for EXIF, or else from texts of the names that ImageMagick and Adobe gave them. Its string may not
    // live in the frame that libpng's errors jump back to.
    [[gnu::noinline]] int orientation() const {
        png_bytep chunk = nullptr;
        png_uint_32 chunk_size = 0;
        Bytes exif, xmp;
        if (png_get_eXIf_1(png_, info_, &chunk_size, &chunk) != 0) exif = {chunk, chunk_size};
        png_textp texts = nullptr;
        int count = 0;
        png_get_text(png_, info_, &texts, &count);
        std::string profile;
        for (int i = 0; i < count; ++i) {
            const std::string_view name = texts[i].key, text = texts[i].text == nullptr ? "" : texts[i].text;
            if (name == "Raw profile type exif" && chunk == nullptr) {
                profile = from_profile(text);
                exif = {reinterpret_cast<const std::uint8_t*>(profile.data()), profile.size()};
            } else if (name == "XML:com.adobe.xmp") {
                xmp = {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()};
            }
        }
        return orientation_of(exif, xmp);
    }

    // The bytes whose digits stand behind three line ends.
    static std::string from_profile(std::string_view text) {
        for (int line = 0; line < 3; ++line) {
            const std::size_t end = text.find('\n');
            if (end == text.npos) return {};
            text.remove_prefix(end + 1);
        }
        std::string bytes;
        int digits = 0;
        for (const char letter : text) {
            const int worth = letter >= '0' && letter <= '9'   ? letter - '0'
                              : letter >= 'a' && letter <= 'f' ? letter - 'a' + 10
                              : letter >= 'A' && letter <= 'F' ? letter - 'A' + 10
                                                               : -1;
            if (worth < 0) continue;
            if (digits++ % 2 == 0) bytes.push_back(0);
            bytes.back() = static_cast<char>(bytes.back() << 4 | worth);
        }
        return bytes;
    }

    png_structp png_ = nullptr;
    png_infop info_ = nullptr;
    Bytes left_;
    bool truncated_ = false;
    std::vector<std::uint8_t> pixels_;
};

class WebP {
  public:
    PictureInfo open(Bytes encoded) {
        encoded_ = encoded;
        if (encoded.size < kRiffHeader + riff_size(encoded)) throw BadPicture{kTruncated};
        require(WebPGetFeatures(encoded.data, encoded.size, &features_));
        return {features_.width, features_.height, orientation(), false};
    }

    void decode(const Window& window, int readable, RowSink& sink) {
        // libwebp cuts at even pixels.
        const int left = features_.has_animation ? 0 : std::max(0, window.left - kMargin) / 2 * 2;
        const int top = features_.has_animation ? 0 : std::max(0, window.top - kMargin) / 2 * 2;
        const int width = std::min(features_.width, window.right + kMargin) - left;
        const int height = std::min(features_.height, window.bottom + kMargin) - top;
        const std::size_t stride = 4 * static_cast<std::size_t>(features_.has_animation ? features_.width : width);
        std::vector<std::uint8_t> pixels(stride * static_cast<std::size_t>(height) +
                                         4 * static_cast<std::size_t>(readable));
        if (features_.has_animation) {
            decode_first_frame(pixels.data(), stride * static_cast<std::size_t>(height));
        } else {
            WebPDecoderConfig config;
            if (WebPInitDecoderConfig(&config) == 0) throw BadPicture{kUndecodable};
            config.options.use_cropping = 1;
            config.options.crop_left = left;
            config.options.crop_top = top;
            config.options.crop_width = width;
            config.options.crop_height = height;
            config.output.colorspace = MODE_RGBA;
            config.output.is_external_memory = 1;
            config.output.u.RGBA = {pixels.data(), static_cast<int>(stride), pixels.size()};
            require(WebPDecode(encoded_.data, encoded_.size, &config));
        }
        std::uint8_t* first = pixels.data() + static_cast<std::size_t>(window.top - top) * stride +
                              4 * static_cast<std::size_t>(window.left - left);
        const int rows = window.bottom - window.top;
        if (features_.has_alpha != 0 || features_.has_animation != 0) {
            for (int y = 0; y < rows; ++y) {
                lay_over_white(first + static_cast<std::size_t>(y) * stride, window.right - window.left);
            }
        }
        send_rows(first, stride, rows, sink);
    }

  private:
    static constexpr std::size_t kRiffHeader = 8;

    static std::size_t riff_size(Bytes encoded) {
        std::size_t size = 0;
        for (std::size_t i = kRiffHeader; i-- > 4;) size = size << 8 | encoded.data[i];
        return size;
    }

    static void require(VP8StatusCode status) {
        if (status == VP8_STATUS_SUSPENDED || status == VP8_STATUS_NOT_ENOUGH_DATA) throw BadPicture{kTruncated};
        if (status != VP8_STATUS_OK) throw BadPicture{kUndecodable};
    }

    int orientation() const {
        constexpr std::size_t kFlags = 20;
        constexpr std::uint8_t kHasExif = 0x08, kHasXmp = 0x04;
        if (encoded_.size <= kFlags || std::memcmp(encoded_.data + 12, "VP8X", 4) != 0 ||
            (encoded_.data[kFlags] & (kHasExif | kHasXmp)) == 0) {
            return 1;
        }
        const WebPData data{encoded_.data, encoded_.size};
        const std::unique_ptr<WebPDemuxer, void (*)(WebPDemuxer*)> demuxer(WebPDemux(&data), WebPDemuxDelete);
        if (demuxer == nullptr) return 1;
        // What is found lies in `encoded_`.
        const auto find = [&](const char* name) -> Bytes {
            WebPChunkIterator chunk{};
            if (WebPDemuxGetChunk(demuxer.get(), name, 1, &chunk) == 0) return {};
            const Bytes found{chunk.chunk.bytes, chunk.chunk.size};
            WebPDemuxReleaseChunkIterator(&chunk);
            return found;
        };
        return orientation_of(find("EXIF"), find("XMP "));
    }

    void decode_first_frame(std::uint8_t* pixels, std::size_t count) const {
        const WebPData data{encoded_.data, encoded_.size};
        const std::unique_ptr<WebPAnimDecoder, void (*)(WebPAnimDecoder*)> decoder(
            WebPAnimDecoderNew(&data, nullptr), WebPAnimDecoderDelete);
        std::uint8_t* canvas = nullptr;
        int timestamp = 0;
        if (decoder == nullptr || WebPAnimDecoderGetNext(decoder.get(), &canvas, &timestamp) == 0) {
            throw BadPicture{kUndecodable};
        }
        std::memcpy(pixels, canvas, count);
    }

    Bytes encoded_;
    WebPBitstreamFeatures features_{};
};

// What another decoder made of a picture.
class Whole {
  public:
    PictureInfo open(Pixels pixels) {
        pixels_ = std::move(pixels);
        const bool positive = pixels_.width > 0 && pixels_.height > 0;
        const std::size_t row = 4 * static_cast<std::size_t>(std::max(0, pixels_.width));
        if (!positive || pixels_.rgba.size() / row != static_cast<std::size_t>(pixels_.height)) throw BadPicture{kUndecodable};
        return {pixels_.width, pixels_.height, 1, false, true};
    }

    void decode(const Window& window, int readable, RowSink& sink) {
        const std::size_t stride = 4 * static_cast<std::size_t>(pixels_.width);
        pixels_.rgba.resize(pixels_.rgba.size() + 4 * static_cast<std::size_t>(readable));
        std::uint8_t* first = reinterpret_cast<std::uint8_t*>(pixels_.rgba.data()) +
                              static_cast<std::size_t>(window.top) * stride + 4 * static_cast<std::size_t>(window.left);
        const int rows = window.bottom - window.top;
        for (int y = 0; y < rows; ++y) {
            lay_over_white(first + static_cast<std::size_t>(y) * stride, window.right - window.left);
        }
        send_rows(first, stride, rows, sink);
        pixels_ = {};
    }

  private:
    Pixels pixels_;
};

bool begins(Bytes encoded, std::size_t offset, const char* magic, std::size_t length) {
    return encoded.size >= offset + length && std::memcmp(encoded.data + offset, magic, length) == 0;
}

}  // namespace

struct PictureDecoder::State {
    enum class Kind { jpeg, png, webp, other } kind = Kind::jpeg;
    Jpeg jpeg;
    Png png;
    WebP webp;
    Whole other;
};

PictureDecoder::PictureDecoder(std::int64_t max_pixels, OtherDecoder other)
    : max_pixels_(max_pixels), other_(std::move(other)), state_(std::make_unique<State>()) {}
PictureDecoder::~PictureDecoder() = default;

PictureInfo PictureDecoder::open(const std::uint8_t* data, std::size_t size) {
    using Kind = State::Kind;
    const Bytes encoded{data, size};
    PictureInfo info{};
    // By content, for names lie.
    if (begins(encoded, 0, "\xFF\xD8\xFF", 3)) {
        state_->kind = Kind::jpeg;
        info = state_->jpeg.open(encoded);
    } else if (begins(encoded, 0, "\x89PNG\r\n\x1A\n", 8)) {
        state_->kind = Kind::png;
        info = state_->png.open(encoded);
    } else if (begins(encoded, 0, "RIFF", 4) && begins(encoded, 8, "WEBP", 4)) {
        state_->kind = Kind::webp;
        info = state_->webp.open(encoded);
    } else if (other_) {
        state_->kind = Kind::other;
        info = state_->other.open(other_(data, size));
    } else {
        throw BadPicture{kUndecodable};
    }
    if (info.width <= 0 || info.height <= 0) throw BadPicture{kUndecodable};
    if (info.width > max_pixels_ / info.height) throw BadPicture{kTooLarge};
    return info;
}

void PictureDecoder::decode(const Window& window, int eighths, int readable, RowSink& sink) {
    using Kind = State::Kind;
    switch (state_->kind) {
        case Kind::jpeg: return state_->jpeg.decode(window, eighths, readable, sink);
        case Kind::png: return state_->png.decode(window, readable, sink);
        case Kind::webp: return state_->webp.decode(window, readable, sink);
        case Kind::other: return state_->other.decode(window, readable, sink);
    }
}

}  // namespace efficientclip

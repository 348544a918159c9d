// A code object as a loader sees it: what it is for, and what its metadata say of every kernel.
//
// Formats: LLVM's "User Guide for AMDGPU Backend" (ELF header, metadata note), MessagePack. Malformed bytes throw
// std::out_of_range or Malformed.
#pragma once

#include <elf.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace standin {

struct Malformed : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Argument {
    size_t offset, size;
};

struct Kernel {
    std::string name;
    size_t lds_bytes = 0, kernarg_bytes = 0, max_block = 0;
    std::vector<Argument> arguments;  // those that the caller gives
};

// One MessagePack value; maps keep their order. Only what LLVM writes is known.
struct Value {
    uint64_t number = 0;
    std::string text;
    std::vector<Value> items;
    std::map<std::string, Value> fields;

    const Value& operator[](const char* name) const {
        const auto found = fields.find(name);
        if (found == fields.end()) throw Malformed(std::string("no ") + name + " in the metadata");
        return found->second;
    }
    bool has(const char* name) const { return fields.count(name); }
};

class Reader {
    const std::string& data;
    size_t at = 0;

    uint64_t take(size_t bytes) {
        uint64_t value = 0;
        for (size_t i = 0; i < bytes; i++) value = value << 8 | uint8_t(data.at(at++));
        return value;
    }
    Value string(size_t size) {
        Value value;
        value.text = data.substr(at, size);
        at += size;
        return value;
    }
    Value array(size_t count) {
        Value value;
        while (count--) value.items.push_back(read());
        return value;
    }
    Value map(size_t count) {
        Value value;
        while (count--) {
            const std::string name = read().text;
            value.fields[name] = read();
        }
        return value;
    }

public:
    explicit Reader(const std::string& data) : data(data) {}

    Value read() {
        const uint8_t code = take(1);
        Value value;
        if (code < 0x80)
            value.number = code;
        else if (code < 0x90)
            return map(code & 15);
        else if (code < 0xA0)
            return array(code & 15);
        else if (code < 0xC0)
            return string(code & 31);
        else if (code == 0xC2 || code == 0xC3)
            value.number = code & 1;
        else if (code >= 0xCC && code <= 0xCF)
            value.number = take(size_t(1) << (code - 0xCC));
        else if (code >= 0xD9 && code <= 0xDB)
            return string(take(size_t(1) << (code - 0xD9)));
        else if (code == 0xDC || code == 0xDD)
            return array(take(code == 0xDC ? 2 : 4));
        else if (code == 0xDE || code == 0xDF)
            return map(take(code == 0xDE ? 2 : 4));
        else
            throw Malformed("a MessagePack code that LLVM does not write");
        return value;
    }
};

struct CodeObject {
    std::string bytes;
    unsigned machine = 0, version = 0;  // e_flags' EF_AMDGPU_MACH, and 3, 4, 5 ...
    std::map<std::string, Kernel> kernels;

    template <typename T>
    static T at(const std::string& data, size_t offset) {
        T value;
        if (offset > data.size() || data.size() - offset < sizeof value) throw Malformed("it ends too early");
        std::memcpy(&value, data.data() + offset, sizeof value);
        return value;
    }

    // `image` is as long as its own header says: the loader is given no size.
    explicit CodeObject(const void* image) {
        if (std::memcmp(image, ELFMAG, SELFMAG) != 0) throw Malformed("no ELF file");
        Elf64_Ehdr header;
        std::memcpy(&header, image, sizeof header);
        constexpr uint16_t kAmdGpu = 224;
        constexpr uint8_t kHsa = 64;
        if (header.e_ident[EI_CLASS] != ELFCLASS64 || header.e_machine != kAmdGpu || header.e_ident[EI_OSABI] != kHsa)
            throw Malformed("no code object for HSA");
        machine = header.e_flags & 0xFF;
        version = header.e_ident[EI_ABIVERSION] + 2;
        bytes.assign(static_cast<const char*>(image), header.e_shoff + size_t(header.e_shnum) * header.e_shentsize);
        for (unsigned i = 0; i < header.e_shnum; i++) {
            const auto section = at<Elf64_Shdr>(bytes, header.e_shoff + size_t(i) * header.e_shentsize);
            if (section.sh_type == SHT_NOTE) read_note(section.sh_offset, section.sh_size);
        }
        if (kernels.empty()) throw Malformed("no kernel in its metadata");
    }

    void read_note(size_t offset, size_t size) {
        constexpr uint32_t kMetadata = 32;
        const auto name_size = at<uint32_t>(bytes, offset), payload = at<uint32_t>(bytes, offset + 4);
        if (at<uint32_t>(bytes, offset + 8) != kMetadata) return;
        const size_t start = offset + 12 + (name_size + 3) / 4 * 4;
        if (start + payload > offset + size) throw Malformed("a note that is longer than its section");
        const std::string packed = bytes.substr(start, payload);
        const Value metadata = Reader(packed).read();
        for (const Value& found : metadata["amdhsa.kernels"].items) {
            Kernel kernel{found[".name"].text,
                          size_t(found[".group_segment_fixed_size"].number),
                          size_t(found[".kernarg_segment_size"].number),
                          size_t(found[".max_flat_workgroup_size"].number),
                          {}};
            if (found.has(".args"))
                for (const Value& argument : found[".args"].items)
                    if (argument[".value_kind"].text.compare(0, 7, "hidden_") != 0)
                        kernel.arguments.push_back(
                            {size_t(argument[".offset"].number), size_t(argument[".size"].number)});
            kernels[kernel.name] = kernel;
        }
    }
};

}  // namespace standin

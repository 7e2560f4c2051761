// How much memory this process may have: the machine's, or what a container allows. Control groups as cgroups(7) and
// the kernel's documentation have them, mountinfo as proc(5).
#include <algorithm>
#include <atomic>
#include <charconv>
#include <cstdint>
#include <fstream>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "ops.h"

#if defined(__linux__)
#include <unistd.h>
#endif

namespace tolaria {
namespace {

constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
constexpr int64_t kCommon = int64_t(4) << 30;

// Where the groups of one kind can be seen: the group `top` is the folder `folder`.
struct Mount {
  std::string top, folder;
};

bool contains(const std::string& list, std::string_view word) {
  std::istringstream words(list);
  for (std::string each; std::getline(words, each, ',');) {
    if (each == word) return true;
  }
  return false;
}

// In mountinfo a space, a tab, a newline and a backslash are three octal digits behind a backslash.
std::string unescaped(const std::string& path) {
  std::string plain;
  for (size_t at = 0; at < path.size(); ++at) {
    int code = 0;
    const char* digits = path.data() + at + 1;
    if (path[at] == '\\' && at + 3 < path.size() && std::from_chars(digits, digits + 3, code, 8).ptr == digits + 3) {
      plain += static_cast<char>(code);
      at += 3;
    } else {
      plain += path[at];
    }
  }
  return plain;
}

// The mounts of control groups: those of version 2, or those of version 1's memory controller.
std::vector<Mount> find_mounts(const std::string& root, bool is_version_2) {
  std::vector<Mount> mounts;
  std::ifstream file(root + "/proc/self/mountinfo");
  for (std::string line; std::getline(file, line);) {
    const size_t dash = line.find(" - ");
    if (dash == std::string::npos) continue;
    std::istringstream before(line.substr(0, dash)), behind(line.substr(dash + 3));
    std::string skipped, top, folder, type, source, options;
    before >> skipped >> skipped >> skipped >> top >> folder;
    behind >> type >> source >> options;
    if (is_version_2 ? type == "cgroup2" : type == "cgroup" && contains(options, "memory")) {
      mounts.push_back({unescaped(top), unescaped(folder)});
    }
  }
  return mounts;
}

// The path of this process's group, as seen from the top of its control group namespace.
std::optional<std::string> find_group(const std::string& root, bool is_version_2) {
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (is_version_2 ? line.compare(0, 2, "0:") == 0 && controllers.empty() : contains(controllers, "memory")) {
      return line.substr(second + 1);
    }
  }
  return std::nullopt;
}

// A group's path below the mount's folder; empty, the folder itself, where the mount does not show that group: a
// container often sees its own alone, under the path that it has outside.
std::string path_below(const Mount& mount, const std::string& group) {
  const std::string top = mount.top == "/" ? "" : mount.top;
  const bool is_inside = (group + "/").compare(0, top.size() + 1, top + "/") == 0;
  if (!is_inside || (group + "/").find("/../") != std::string::npos) return "";
  const std::string path = group.substr(top.size());
  return path.size() > 1 && path[0] == '/' ? path : "";
}

// The number in a file of one; none for "max", and where there is no such file.
int64_t number_in(const std::string& path) {
  std::ifstream file(path);
  int64_t value = 0;
  return file >> value && value >= 0 ? value : kNone;
}

// The lowest limit of the groups above, too, which version 1 tells even of those that cannot be seen.
int64_t hierarchical_limit(const std::string& folder) {
  std::ifstream file(folder + "/memory.stat");
  std::string key;
  for (uint64_t value = 0; file >> key >> value;) {
    if (key == "hierarchical_memory_limit") return static_cast<int64_t>(std::min<uint64_t>(value, kNone));
  }
  return kNone;
}

int64_t limit_of(const std::string& folder, bool is_version_2) {
  if (is_version_2) return std::min(number_in(folder + "/memory.max"), number_in(folder + "/memory.high"));
  return std::min(number_in(folder + "/memory.limit_in_bytes"), hierarchical_limit(folder));
}

int64_t machine_memory() {
#if defined(__linux__)
  const int64_t pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGE_SIZE);
  if (pages > 0 && page > 0) return pages * page;
#endif
  return kCommon;
}

std::atomic<int64_t>& limit() {
  static std::atomic<int64_t> value = std::min(machine_memory(), control_group_limit(""));
  return value;
}

}  // namespace

int64_t control_group_limit(const std::string& root) {
  int64_t lowest = kNone;
  for (const bool is_version_2 : {false, true}) {  // a machine may have both
    const std::optional<std::string> group = find_group(root, is_version_2);
    if (!group) continue;
    for (const Mount& mount : find_mounts(root, is_version_2)) {
      for (std::string path = path_below(mount, *group);; path.resize(path.rfind('/'))) {  // upwards
        lowest = std::min(lowest, limit_of(root + mount.folder + path, is_version_2));
        if (path.empty()) break;
      }
    }
  }
  return lowest;
}

int64_t memory_limit() { return limit().load(std::memory_order_relaxed); }

int64_t assume_memory_limit(int64_t bytes) { return limit().exchange(bytes); }

}  // namespace tolaria

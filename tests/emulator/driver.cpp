// Runs every kernel of csrc/cuda in three orders of threads and compares the results bit for bit; the sanitizers watch.
// Sizes give several blocks of threads and a tail; structures that are wrong must not lead a kernel out of its memory.
#include "driver.h"

#include <cstdio>

#include "machine.h"

namespace {

using namespace driver;

bool same_in_every_order(const Run& one) {
  Bytes first;
  for (int order : {0, 1, 7}) {
    simt::schedule() = order;
    generator.seed(1);
    Bytes found = one.run();
    if (order == 0) first = found;
    if (found != first) {
      printf("%s: order %d gives another result\n", one.name.c_str(), order);
      return false;
    }
  }
  printf("%s: same in every order\n", one.name.c_str());
  return true;
}

}  // namespace

// Runs all, or those with the given words in their name.
int main(int count, char** arguments) {
  const std::string words = count > 1 ? arguments[1] : "";
  bool good = true;
  for (const auto& part : {driver::steps(), driver::selections(), driver::layers()}) {
    for (const Run& one : part) {
      if (one.name.find(words) != std::string::npos) good &= same_in_every_order(one);
    }
  }
  return good ? 0 : 1;
}

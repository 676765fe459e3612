// Answers a text with an export for ONNX Runtime GenAI:
//
//   answer exported/genai '[{"role": "user", "content": "def half(x): return x / 2"}]'
//
// Headers and library are in the archive of its release: g++ -std=c++20 answer.cpp -I include -L lib -lonnxruntime-genai
#include <iostream>

#include "ort_genai.h"

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: answer FOLDER MESSAGES\n";
    return 2;
  }
  const OgaHandle handle;  // ends the library when it goes
  const auto model = OgaModel::Create(argv[1]);
  const auto tokenizer = OgaTokenizer::Create(*model);

  // The chat template is the student's prompt with the decoder's start token behind it.
  const auto prompt = OgaSequences::Create();
  tokenizer->Encode(tokenizer->ApplyChatTemplate(nullptr, argv[2], nullptr, true), *prompt);

  const auto settings = OgaGeneratorParams::Create(*model);
  settings->SetSearchOption("max_length", prompt->SequenceCount(0) + 48.0);  // of prompt and answer
  const auto generator = OgaGenerator::Create(*model, *settings);
  generator->AppendTokenSequences(*prompt);

  const auto stream = OgaTokenizerStream::Create(*tokenizer);
  while (!generator->IsDone()) {
    generator->GenerateNextToken();
    std::cout << stream->Decode(generator->GetNextTokens()[0]) << std::flush;
  }
  std::cout << "\n";
}

import CoreML

let encoder = try MLModel(contentsOf: encoderURL)   // compiled by Xcode, or by MLModel.compileModel(at:)
let decoder = try MLModel(contentsOf: decoderURL)

func ids(_ numbers: [Int32]) throws -> MLMultiArray {
    let array = try MLMultiArray(shape: [1, numbers.count as NSNumber], dataType: .int32)
    for (index, number) in numbers.enumerated() { array[index] = NSNumber(value: number) }
    return array
}

func answer(_ prompt: [Int32], start: Int32, end: Int32, longest: Int) throws -> [Int32] {
    let mask = try ids(prompt.map { _ in 1 })
    let read = try encoder.prediction(from: MLDictionaryFeatureProvider(
        dictionary: ["input_ids": try ids(prompt), "attention_mask": mask]))
    let state = decoder.makeState()
    var answer: [Int32] = [], token = start
    for position in 0..<longest {
        let place = try MLMultiArray(shape: [1], dataType: .int32)
        place[0] = NSNumber(value: position)
        let step = try decoder.prediction(from: MLDictionaryFeatureProvider(dictionary: [
            "input_ids": try ids([token]), "encoder_attention_mask": mask, "position": place,
            "cross_keys": read.featureValue(for: "cross_keys")!,
            "cross_values": read.featureValue(for: "cross_values")!,
        ]), using: state)
        let logits = MLShapedArray<Float16>(step.featureValue(for: "logits")!.multiArrayValue!).scalars
        token = Int32(logits.indices.max { logits[$0] < logits[$1] }!)
        if token == end { break }
        answer.append(token)
    }
    return answer
}
